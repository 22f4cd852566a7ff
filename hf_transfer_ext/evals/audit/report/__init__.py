"""An audit as one HTML file, and its charts as pictures."""
