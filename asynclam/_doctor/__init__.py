"""What ``asynclam doctor`` tries, how it is kept from hanging, and what it says."""
