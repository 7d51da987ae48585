"""What the parts are worth to learning: curves over seeds, each drawn from committed JSON."""
