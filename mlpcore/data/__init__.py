"""Training data: arrays in memory, streams and Parquet files, checked and cut into batches."""
