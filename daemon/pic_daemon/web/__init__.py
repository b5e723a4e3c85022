"""The match log as a place to work: pages for people, served by Datasette."""
