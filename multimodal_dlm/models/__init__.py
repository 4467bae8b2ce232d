"""The backbone and its parts."""
