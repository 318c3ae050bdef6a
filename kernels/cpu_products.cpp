// Products of small matrices on the CPU, C = A B or C += A B: of the layers, their gradients and
// their weights. A and B have any strides, C is row-major. Compiled with fused multiply-adds.
#include "arguments.h"
#include "sums.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

template <class T>
struct Registers {
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
  static constexpr int rows = VECTOR_BYTES == 64 ? 8 : 6;  // of a tile of two vectors
  static constexpr int depth = 256;                        // rows of B in a packed panel
};

// C (rows x V vectors) = or += A B, where B's rows are `b_row` apart. Of the last vector only
// `width` entries of a row are stored.
template <class T, int rows, int V>
void multiply_tile(const T* A, int64 a_row, int64 a_column, const T* B, int64 b_row, T* C,
                   int64 c_row, int64 k, int64 width, bool more) {
  using Vector = typename Registers<T>::Vector;
  constexpr int lanes = Registers<T>::lanes;
  Vector sums[rows][V] = {};
  for (int64 p = 0; p < k; ++p) {
    Vector b[V];
    for (int v = 0; v < V; ++v) __builtin_memcpy(&b[v], B + p * b_row + v * lanes, sizeof(Vector));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const T a = A[i * a_row + p * a_column];
      for (int v = 0; v < V; ++v) sums[i][v] += a * b[v];
    }
  }
  for (int i = 0; i < rows; ++i) {
    T row[V * lanes];
    __builtin_memcpy(row, sums[i], sizeof row);
    T* const c = C + i * c_row;
    if (width == V * lanes && !more) {
      __builtin_memcpy(c, row, sizeof row);
    } else {
      for (int64 j = 0; j < width; ++j) c[j] = more ? c[j] + row[j] : row[j];
    }
  }
}

// The same for any number of rows.
template <class T, int V, int rows = Registers<T>::rows>
void multiply_panel(const T* A, int64 a_row, int64 a_column, const T* B, int64 b_row, T* C,
                    int64 c_row, int64 m, int64 k, int64 width, bool more) {
  for (; m >= rows; m -= rows, A += rows * a_row, C += rows * c_row)
    multiply_tile<T, rows, V>(A, a_row, a_column, B, b_row, C, c_row, k, width, more);
  if constexpr (rows > 1) {
    if (m) {
      constexpr int fewer = rows > 4 ? 4 : rows / 2;
      multiply_panel<T, V, fewer>(A, a_row, a_column, B, b_row, C, c_row, m, k, width, more);
    }
  }
}

// Packs columns of B into a panel of V vectors with zeros at the end, `depth` rows at a time.
template <class T, int V>
void multiply_packed(const Product<T>& p, int64 first, int64 width) {
  constexpr int columns = V * Registers<T>::lanes, depth = Registers<T>::depth;
  T panel[depth * columns];
  for (int64 begin = 0; begin < p.k || begin == 0; begin += depth) {
    const int64 rows = p.k - begin < depth ? p.k - begin : depth;
    for (int64 i = 0; i < rows; ++i) {
      const T* const b = p.B + (begin + i) * p.b_row + first * p.b_column;
      T* const to = panel + i * columns;
      for (int64 j = 0; j < width; ++j) to[j] = b[j * p.b_column];
      for (int64 j = width; j < columns; ++j) to[j] = 0;
    }
    multiply_panel<T, V>(p.A + begin * p.a_column, p.a_row, p.a_column, panel, columns,
                         p.C + first, p.c_row, p.m, rows, width, p.accumulate || begin > 0);
  }
}

// C is a column: its entries are inner products, or it is a sum of columns of A.
template <class T>
void multiply_column(const Product<T>& p) {
  if (p.a_row == 1) {
    for (int64 j = 0; j < p.k; ++j) {
      const T b = p.B[j * p.b_row], *const a = p.A + j * p.a_column;
      const bool more = p.accumulate || j > 0;
#pragma omp simd
      for (int64 i = 0; i < p.m; ++i) p.C[i * p.c_row] = b * a[i] + (more ? p.C[i * p.c_row] : T(0));
    }
    return;
  }
  for (int64 i = 0; i < p.m; ++i) {
    const T* const a = p.A + i * p.a_row;
    const T sum = total<T>(p.k, [=](int64 j) { return a[j * p.a_column] * p.B[j * p.b_row]; });
    T& c = p.C[i * p.c_row];
    c = p.accumulate ? c + sum : sum;
  }
}

// Returns the product of these rows of A.
template <class T>
Product<T> of_rows(Product<T> p, Range rows) {
  p.A += rows.begin * p.a_row, p.C += rows.begin * p.c_row, p.m = rows.end - rows.begin;
  return p;
}

template <class T>
void multiply(const Product<T>& whole, const Part& part) {
  const Product<T> p = of_rows(whole, part.of(whole.m, Registers<T>::rows));
  if (p.n == 1) return multiply_column(p);
  constexpr int64 one = Registers<T>::lanes, two = 2 * one;
  int64 j = 0;
  for (; j + two <= p.n; j += two) {
    if (p.b_column == 1) {
      multiply_panel<T, 2>(p.A, p.a_row, p.a_column, p.B + j, p.b_row, p.C + j, p.c_row, p.m, p.k,
                           two, p.accumulate);
    } else {
      multiply_packed<T, 2>(p, j, two);
    }
  }
  const int64 rest = p.n - j;
  if (rest > one) multiply_packed<T, 2>(p, j, rest);
  if (0 < rest && rest <= one) multiply_packed<T, 1>(p, j, rest);
}

// The same by the BLAS function at p.gemm, of the interface with 64-bit integers, in p.parts parts:
// BLAS may round a row differently if there are other rows.
template <class T>
void multiply_by_blas(const Product<T>& whole, const Part& part) {
  enum { ROW_MAJOR = 101, AS_IS = 111, TRANSPOSED = 112 };
  using Gemm = void (*)(int, int, int, int64, int64, int64, T, const T*, int64, const T*, int64, T,
                        T*, int64);
  for (int64 i = part.index; i < whole.parts; i += part.count) {
    const Product<T> p = of_rows(whole, Part{i, whole.parts}.of(whole.m, Registers<T>::rows));
    if (p.m == 0) continue;
    const bool a = p.a_column == 1, b = p.b_column == 1;
    reinterpret_cast<Gemm>(p.gemm)(ROW_MAJOR, a ? AS_IS : TRANSPOSED, b ? AS_IS : TRANSPOSED, p.m,
                                   p.n, p.k, T(1), p.A, a ? p.a_row : p.a_column, p.B,
                                   b ? p.b_row : p.b_column, T(p.accumulate != 0), p.C, p.c_row);
  }
}
