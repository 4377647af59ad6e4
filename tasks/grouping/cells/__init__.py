"""Neighbours and chains of large partitions: small overlapping sets of similar documents, compared exactly."""
