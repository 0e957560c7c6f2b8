"""How good the demo experts are: an independent judge, distances, tables and sheets of docs/DEMO.md."""
