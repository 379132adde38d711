"""Language models over bytes."""
