"""Human feedback: files to records, records to splits. Begin with `records`, then `splits.load`."""
