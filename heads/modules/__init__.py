"""What a head is: modules that map features to vertices."""
