"""task=circuit: finding what is declared, discovering what is not, and the page."""
