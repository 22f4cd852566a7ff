"""An audit as one HTML file and as plots."""
