"""What only a particular dashboard can do."""
