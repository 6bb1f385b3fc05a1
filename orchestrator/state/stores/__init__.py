"""The stores included in the package."""
