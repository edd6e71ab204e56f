"""Pure functions on arrays: no flax, no mesh. Import the operations by their modules."""
