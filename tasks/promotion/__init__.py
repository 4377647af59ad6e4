"""Which model is champion: new documents, gate, promotion."""
