"""The mathematics: it is handed arrays and the operations of a backend."""
