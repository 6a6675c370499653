"""Webdataset tars wherever they lie: storage, index, reading and writing."""
