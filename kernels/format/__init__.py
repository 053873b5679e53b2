"""What is stored: precisions, packed blocks, the state of a site."""
