"""What is attended to, and how, recognised by structure and by trial."""
