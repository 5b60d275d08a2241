"""What a backbone is trained to do."""
