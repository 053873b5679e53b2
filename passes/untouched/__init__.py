"""What a model's forward reads and writes, found, watched and put back."""
