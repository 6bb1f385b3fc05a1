"""Import the state of older layouts."""
