"""Independent re-derivations to compare with: NumPy, float64, one trajectory at a time."""
