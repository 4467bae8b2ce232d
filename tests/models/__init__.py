"""Tests of the backbone."""
