"""Find what runs left behind, and remove records of ended runs."""
