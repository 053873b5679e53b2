"""Models to try and to test on, none of them downloaded."""
