"""What `make docs` builds the site with: pages and tables made of the sources and of stored results."""
