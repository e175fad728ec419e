"""The ops: what is computed, with its schema, checks, fake and gradient. How is the business of ``backends``."""
