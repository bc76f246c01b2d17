"""Where dorafx meets other libraries' own switches. Importing this package imports none of them."""
