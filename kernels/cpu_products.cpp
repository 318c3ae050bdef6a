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
  static constexpr int sums = VECTOR_BYTES == 64 ? 24 : 12;   // vectors of C in a tile
  static constexpr int vectors = VECTOR_BYTES == 64 ? 4 : 2;  // of them in a row, at most
  static constexpr int depth = 192;                           // rows of B in a packed panel
  static constexpr int block = 96;                            // rows of A packed at a time
  static constexpr int64 few = 64;                            // rows of A for which B is not packed
};

// Rows of a tile whose rows have V vectors.
template <class T, int V>
constexpr int tile_rows = Registers<T>::sums / V < 12 ? Registers<T>::sums / V : 12;

// A matrix that begins at `data`.
template <class T>
struct Strided {
  const T* data;
  int64 row, column;
};

// C (rows x V vectors) = A B or, `more`, += A B.
template <class T, int rows, int V>
__attribute__((noinline)) void multiply_tile(const Strided<T>& A, const T* B, int64 b_row, T* C,
                                             int64 c_row, int64 k, bool more) {
  using Vector = typename Registers<T>::Vector;
  constexpr int lanes = Registers<T>::lanes;
  Vector sums[rows][V] = {};
  for (int64 p = 0; p < k; ++p) {
    Vector b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) __builtin_memcpy(&b[v], B + p * b_row + v * lanes, sizeof(Vector));
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
      const T a = A.data[i * A.row + p * A.column];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[i][v] += a * b[v];
    }
  }
  if (more) {
#pragma GCC unroll 12
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vector c;
        __builtin_memcpy(&c, C + i * c_row + v * lanes, sizeof c);
        sums[i][v] += c;
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      __builtin_memcpy(C + i * c_row + v * lanes, &sums[i][v], sizeof(Vector));
  }
}

// The same for m rows, of which `width` entries are stored.
template <class T, int V, int rows = tile_rows<T, V>>
void multiply_panel(const Strided<T>& whole, const T* B, int64 b_row, T* C, int64 c_row, int64 m,
                    int64 k, int64 width, bool more) {
  constexpr int columns = V * Registers<T>::lanes;
  Strided<T> A = whole;
  for (; m >= rows; m -= rows, A.data += rows * A.row, C += rows * c_row) {
    if (width == columns) {
      multiply_tile<T, rows, V>(A, B, b_row, C, c_row, k, more);
      continue;
    }
    T tile[rows * columns];
    multiply_tile<T, rows, V>(A, B, b_row, tile, columns, k, false);
    for (int64 i = 0; i < rows; ++i) {
      T *const c = C + i * c_row, *const sums = tile + i * columns;
      for (int64 j = 0; j < width; ++j) c[j] = more ? c[j] + sums[j] : sums[j];
    }
  }
  if constexpr (rows > 1) {
    constexpr int fewer = rows > 8 ? 8 : rows > 4 ? 4 : rows / 2;
    if (m) multiply_panel<T, V, fewer>(A, B, b_row, C, c_row, m, k, width, more);
  }
}

// low, high = a[0], b[0], a[1], b[1], …
template <class Vector, int lanes>
inline void interleave(Vector a, Vector b, Vector& low, Vector& high) {
#if defined(__clang__)
#pragma unroll
  for (int i = 0; i < lanes; ++i) {
    low[i] = (i % 2 ? b : a)[i / 2];
    high[i] = (i % 2 ? b : a)[(i + lanes) / 2];
  }
#else
  decltype(a < b) first = {}, second = {};
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    first[i] = i / 2 + i % 2 * lanes;
    second[i] = (i + lanes) / 2 + i % 2 * lanes;
  }
  low = __builtin_shuffle(a, b, first), high = __builtin_shuffle(a, b, second);
#endif
}

// Copies a square block whose columns are contiguous into rows of `columns` entries.
template <class T, int columns>
void transpose(const T* from, int64 column, T* to) {
  using Vector = typename Registers<T>::Vector;
  constexpr int lanes = Registers<T>::lanes, half = lanes / 2;
  Vector block[lanes], turned[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) __builtin_memcpy(&block[i], from + i * column, sizeof(Vector));
#pragma GCC unroll 4
  for (int turn = 1; turn < lanes; turn *= 2) {  // the bits of an entry's index, by one place
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      interleave<Vector, lanes>(block[i], block[half + i], turned[2 * i], turned[2 * i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) block[i] = turned[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) __builtin_memcpy(to + i * columns, &block[i], sizeof(Vector));
}

// Copies B into rows of `columns` entries with zeros at their ends.
template <class T, int columns>
void pack(const Strided<T>& B, int64 k, int64 width, T* to) {
  constexpr int lanes = Registers<T>::lanes;
  const bool turned = B.row == 1 && B.column != 1;
  const int64 whole = turned ? k / lanes * lanes : 0;  // rows that are transposed block by block
  for (int64 i = 0; i < whole; i += lanes) {
    for (int64 j = 0; j + lanes <= width; j += lanes)
      transpose<T, columns>(B.data + i + j * B.column, B.column, to + i * columns + j);
  }
  const int64 done = width / lanes * lanes;  // columns of them
  for (int64 i = 0; i < k; ++i, to += columns) {
    const T* const from = B.data + i * B.row;
    if (B.column == 1 && width == columns) {
      __builtin_memcpy(to, from, sizeof(T) * columns);
    } else {
      for (int64 j = i < whole ? done : 0; j < width; ++j) to[j] = from[j * B.column];
      for (int64 j = width; j < columns; ++j) to[j] = 0;
    }
  }
}

// Columns of C = A B, or +=, with a panel of B of at most `depth` rows that is packed first. (Each
// function has only the arrays that it needs: a large stack frame takes time.)
template <class T, int V, int depth>
__attribute__((noinline)) void multiply_packed(const Strided<T>& A, const Strided<T>& B, T* C,
                                               int64 c_row, int64 m, int64 k, int64 width,
                                               bool more) {
  constexpr int columns = V * Registers<T>::lanes;
  alignas(VECTOR_BYTES) T panel[depth * columns];
  pack<T, columns>(B, k, width, panel);
  multiply_panel<T, V>(A, panel, columns, C, c_row, m, k, width, more);
}

// Columns of C = A B, or +=, of V vectors. B is packed unless it is read only a few times and its
// rows are contiguous.
template <class T, int V>
void multiply_columns(const Strided<T>& A, const Strided<T>& B, T* C, int64 c_row, int64 m, int64 k,
                      int64 width, bool more) {
  constexpr int lanes = Registers<T>::lanes, shallow = 16;
  if constexpr (V > 1) {
    if (width <= (V - 1) * lanes)
      return multiply_columns<T, V - 1>(A, B, C, c_row, m, k, width, more);
  }
  if (B.column == 1 && width == V * lanes && m <= Registers<T>::few)
    return multiply_panel<T, V>(A, B.data, B.row, C, c_row, m, k, width, more);
  if (k <= shallow) return multiply_packed<T, V, shallow>(A, B, C, c_row, m, k, width, more);
  multiply_packed<T, V, Registers<T>::depth>(A, B, C, c_row, m, k, width, more);
}

// C = A B, or +=, for at most `depth` columns of A.
template <class T>
void multiply_rows(const Strided<T>& A, const Strided<T>& B, T* C, int64 c_row, int64 m, int64 n,
                   int64 k, bool more) {
  constexpr int64 columns = Registers<T>::vectors * Registers<T>::lanes;
  for (int64 j = 0; j < n; j += columns) {
    const Strided<T> from = {B.data + j * B.column, B.row, B.column};
    const int64 width = n - j < columns ? n - j : columns;
    multiply_columns<T, Registers<T>::vectors>(A, from, C + j, c_row, m, k, width, more);
  }
}

// The same for an A whose columns are contiguous and far apart: blocks of it are packed.
template <class T>
__attribute__((noinline)) void multiply_blocks(const Strided<T>& A, const Strided<T>& B, T* C,
                                               int64 c_row, int64 m, int64 n, int64 k, bool more) {
  constexpr int64 block = Registers<T>::block;
  alignas(VECTOR_BYTES) T packed[block * Registers<T>::depth];
  for (int64 first = 0; first < m; first += block) {
    const int64 rows = m - first < block ? m - first : block;
    for (int64 i = 0; i < k; ++i) {
      const T* const from = A.data + first + i * A.column;
      for (int64 j = 0; j < rows; ++j) packed[i * block + j] = from[j];
    }
    multiply_rows<T>({packed, 1, block}, B, C + first * c_row, c_row, rows, n, k, more);
  }
}

// These rows of a C that is a column: its entries are inner products, or it is a sum of columns of
// A.
template <class T>
void multiply_column(const Product<T>& p, Range mine) {
  if (p.a_row == 1) {
    for (int64 j = 0; j < p.k; ++j) {
      const T b = p.B[j * p.b_row], *const a = p.A + j * p.a_column;
      const bool more = p.accumulate || j > 0;
#pragma omp simd
      for (int64 i = mine.begin; i < mine.end; ++i)
        p.C[i * p.c_row] = b * a[i] + (more ? p.C[i * p.c_row] : T(0));
    }
    return;
  }
  for (int64 i = mine.begin; i < mine.end; ++i) {
    const T* const a = p.A + i * p.a_row;
    const T sum = total<T>(p.k, [=](int64 j) { return a[j * p.a_column] * p.B[j * p.b_row]; });
    T& c = p.C[i * p.c_row];
    c = p.accumulate ? c + sum : sum;
  }
}

// C = A B, or +=, for tiny matrices, without packing.
template <class T>
void multiply_tiny(const Product<T>& p) {
  for (int64 i = 0; i < p.m; ++i) {
    T sums[Registers<T>::lanes] = {};
    for (int64 k = 0; k < p.k; ++k) {
      const T a = p.A[i * p.a_row + k * p.a_column], *const b = p.B + k * p.b_row;
      for (int64 j = 0; j < p.n; ++j) sums[j] += a * b[j * p.b_column];
    }
    T* const c = p.C + i * p.c_row;
    for (int64 j = 0; j < p.n; ++j) c[j] = p.accumulate ? c[j] + sums[j] : sums[j];
  }
}

// Threads share rows or columns of C, so that each reads less of A and B.
template <class T>
void multiply(const Product<T>& p, const Part& part) {
  constexpr int64 depth = Registers<T>::depth,
                  columns = Registers<T>::vectors * Registers<T>::lanes;
  if (p.n == 1) return multiply_column(p, part.of(p.m));
  if (p.n <= Registers<T>::lanes && p.m * p.n * p.k <= 256) {
    if (part.index == 0) multiply_tiny(p);
    return;
  }
  Range i = {0, p.m}, j = {0, p.n};
  if (p.n > p.m) {
    j = part.of(p.n, Registers<T>::lanes);
  } else {
    i = part.of(p.m, tile_rows<T, Registers<T>::vectors>);
  }
  const int64 m = i.end - i.begin, n = j.end - j.begin;
  const bool far = p.a_row == 1 && p.a_column * int64(sizeof(T)) >= 4096 && n >= 4 * columns;
  for (int64 begin = 0; begin < p.k || begin == 0; begin += depth) {
    const int64 k = p.k - begin < depth ? p.k - begin : depth;
    const Strided<T> A = {p.A + i.begin * p.a_row + begin * p.a_column, p.a_row, p.a_column},
                     B = {p.B + begin * p.b_row + j.begin * p.b_column, p.b_row, p.b_column};
    (far ? multiply_blocks<T> : multiply_rows<T>)(A, B, p.C + i.begin * p.c_row + j.begin, p.c_row,
                                                  m, n, k, p.accumulate || begin > 0);
  }
}
