"""The page: jobs and their curves, live, in a browser. It reads what a ``Reading`` offers and knows no store."""
