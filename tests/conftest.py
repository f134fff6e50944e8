"""Being here puts this folder on Python's path, so that every test can import `tiny`."""
