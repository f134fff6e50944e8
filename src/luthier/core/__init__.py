"""The words of the house: types, protocols, config, errors. Imports the standard library, torch and pydantic only."""
