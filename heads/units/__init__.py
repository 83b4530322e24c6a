"""Steps as units that share nothing but files, done by any number of processes on any number of machines."""
