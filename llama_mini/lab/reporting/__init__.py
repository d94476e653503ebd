"""The pictures of the lab, and the page that shows them all."""
