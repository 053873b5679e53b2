"""What is measured, each with its results as JSON in `results/`: device, versions and command included."""
