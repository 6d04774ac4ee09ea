"""Everything around the method, one component a file; the method itself is one folder up."""
