"""The operations of the mathematics on each device, and the devices themselves."""
