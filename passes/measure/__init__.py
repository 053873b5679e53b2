"""How much each site's keys and values matter to the loss."""
