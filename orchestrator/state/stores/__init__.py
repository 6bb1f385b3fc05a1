"""The stores that ship with the package."""
