"""The one corridor from a request to a delivered folder."""
