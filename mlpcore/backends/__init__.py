"""The devices, and the operations of the mathematics on each of them."""
