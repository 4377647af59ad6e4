"""The parts of `languages`: its settings, labels of parts of the documents, models that users bring."""
