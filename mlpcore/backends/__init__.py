"""How the operations run."""
