"""The ways that a user's rows take into the engine: arrays, streams, Parquet files."""
