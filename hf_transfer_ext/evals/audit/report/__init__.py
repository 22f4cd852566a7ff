"""The report of an audit as one HTML file, and its charts as images."""
