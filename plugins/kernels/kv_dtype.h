// Element types by number, as they travel in plugin fields and between languages.
#pragma once

namespace memshare {

enum class KvDtype : int { kFp32 = 0, kFp16 = 1, kBf16 = 2, kFp8E4M3 = 3, kInt8 = 4 };

} // namespace memshare
