"""Types, protocols, config and errors that all packages share. Imports only the standard library, torch and
pydantic."""
