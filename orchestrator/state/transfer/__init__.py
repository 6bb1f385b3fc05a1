"""Copy, export and import whole stores."""
