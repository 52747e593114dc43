"""Scripts to run from a checkout, and the package ``launch.trainer`` that they share."""
