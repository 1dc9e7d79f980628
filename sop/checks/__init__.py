"""Parts of the independent check of a derived series: they read files themselves and share nothing with the writer."""
