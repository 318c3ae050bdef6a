"""The CPU with the passes between its products compiled at run time."""
